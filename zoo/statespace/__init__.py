"""State spaces: each feature passes through a linear recurrence, which is also one long convolution.

No token is compared with another; the step of a system says for how many tokens it remembers. A state of one size serves any
length.

Choose
    s4: For signals: pixels, audio, sensors, thousands of samples long.
"""
