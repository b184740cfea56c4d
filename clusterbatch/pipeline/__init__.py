"""All stages as one run: refresh rounds, summary, report, inspection and cleaning of a workspace."""
