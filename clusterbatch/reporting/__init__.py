"""Parts of the reports: templates, figures, phrases in two languages, and views of clusters and batches."""
