"""The TFDS data set `lra_listops`; importing `lra_listops_dataset_builder` registers it."""
