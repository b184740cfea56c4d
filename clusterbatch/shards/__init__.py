"""The shuffle by cluster, and the storage format that training reads."""
