"""State spaces: a linear recurrence over the tokens, which is also one long convolution.

No token is compared with another; the step of a system says for how many tokens it remembers. A state of one size serves any
length.

Choose
    s4: For signals: pixels, audio, sensors, thousands of samples long.
    dss: For the same as S4 with a kernel of one line; with "softmax" also for modes that grow, at one known length.
    s5: For the same as S4, with one system of all features and fewer states.
    lru: For the same as S4, with the plainest parameters: a decay and a phase for each mode, and no step.
    rglru: For text at a state of one vector: each token decides what is kept of the past; causal only.
    hgrn: For text, as RG-LRU, with a state of complex numbers, and a bound that keeps upper layers from forgetting.
    h3: For the same as S4 where tokens are also to be compared: by products, with what came just before.
    mamba: For the same as RG-LRU with N states of each feature: the token also chooses what is written and what is read.
    mega: For text, where a moving average alone forgets what to compare: attention of one head, gated, over it.
"""
