"""The TFDS data set `lra_text`; importing `lra_text_dataset_builder` registers it."""
