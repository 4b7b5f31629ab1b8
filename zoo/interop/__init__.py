"""Published checkpoints: weights from Hugging Face's state dicts, in the layers of this library.

    >>> from subquad.zoo.interop import from_huggingface
    >>> from_huggingface({"model_type": "gpt2"}, {})
    Traceback (most recent call last):
    ValueError: from_huggingface: config['model_type'] must be one of big_bird, fnet, longformer, longt5, mega, nystromformer, \
reformer, got 'gpt2'. Other models are not written down here.
"""

from subquad.zoo.interop.huggingface import Loaded, from_huggingface

__all__ = ["Loaded", "from_huggingface"]
