"""Which rows stand together in a step: the batch plan (a pure function) and the loader that follows it."""
