"""Delta: linear attention whose state corrects itself, so that a new value takes the place of the old one under its key.

The state is a matrix, of one size whatever came before. What a key reads of it is compared with what it should read, and the
difference is written: one step of gradient descent on |S^T k - v|^2 / 2, at a rate that the token chooses.

Choose
    deltanet: For recall from a small state: keys overwrite, and nothing fades.
"""
