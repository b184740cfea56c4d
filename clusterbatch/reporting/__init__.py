"""What reports are made of: templates, figures, phrases in two languages, and views of clusters and batches."""
