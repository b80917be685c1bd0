"""A folder of documents, and the index by which passages of it are found."""
