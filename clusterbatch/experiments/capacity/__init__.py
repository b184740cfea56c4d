"""Model of time, memory and cost for a corpus and a cluster of machines."""
