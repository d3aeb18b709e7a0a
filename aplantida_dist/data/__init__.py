"""The data side: what a dataset is, the order it is read in, and the stream of micro-batches."""
