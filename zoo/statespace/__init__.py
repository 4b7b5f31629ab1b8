"""State spaces: a linear recurrence over the tokens, which is also one long convolution.

No token is compared with another; the step of a system says for how many tokens it remembers. A state of one size serves any
length.

Choose
    s4: For signals: pixels, audio, sensors, thousands of samples long.
    s5: For the same, with one system of all features and fewer states.
    lru: For the same, with the plainest parameters: a decay and a phase for each mode, and no step.
"""
