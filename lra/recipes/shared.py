"""What several pages say in the same words."""

# The arena's model of Text, and its schedule.
ARENA_TEXT = dict(in_features=256, num_layers=4, mlp_features=1024, steps=20_000, warmup_steps=8000)
# Path-X is Pathfinder at 128 x 128, hard, in both readings.
PATH_X = "pathfinder/*128_hard"

# Of papers that inherit the arena's reading of pictures.
BLACK = "Black is the id 1 and is attended to; theirs takes it for padding."
# What is generated here where others read the arena's files.
DRAWN = (
    ("listops/lra", "Trees are drawn anew by the arena's rules; its own files are listops/release."),
    ("pathfinder/32_*|64_*|128_*|256_*", "Pictures are drawn by our own generator; the arena's are pathfinder/release_*."),
)
