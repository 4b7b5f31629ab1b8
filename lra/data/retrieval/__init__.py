"""The TFDS data set `lra_retrieval`; importing `lra_retrieval_dataset_builder` registers it."""
