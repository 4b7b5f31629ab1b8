"""Stand-ins that need no network, and their TFDS data set `offline`; importing `offline_dataset_builder` registers it."""
