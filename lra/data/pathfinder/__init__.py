"""The TFDS data set `lra_pathfinder`; importing `lra_pathfinder_dataset_builder` registers it."""
