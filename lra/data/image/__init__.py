"""The TFDS data set `lra_image`; importing `lra_image_dataset_builder` registers it."""
