"""Generation with a draft: the model's own tokens, in fewer calls of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo import generation
from tests.zoo.test_generation import Bigrams
from tests.zoo.test_model import SMALL, tokens

MIXERS = {
    "softmax": ("softmax", dict(num_heads=2)),
    "deltanet": ("deltanet", dict(num_heads=2)),
    "hybrid": (["gla", "softmax"], dict(num_heads=2)),
}
PROMPT, MASK = tokens((3, 4)), jnp.arange(4) >= jnp.array([[0], [3], [1]])


@functools.cache
def language_model(mixer):
    kind, options = MIXERS[mixer]
    # Not tied, or else it says the same token again and again, whatever the cache.
    return zoo.CausalLM(**SMALL, mixer=kind, mixer_options=options, tie_embeddings=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mixer,draft", [("softmax", "deltanet"), ("deltanet", "hybrid"), ("hybrid", "softmax")])
def test_greedy_tokens_are_the_models_own(mixer, draft):
    """Up to the last learned position, of unequal prompts and of samples that stop at unequal places or never."""
    model = language_model(mixer)
    wanted = np.array(model.generate(PROMPT, 37, mask=MASK))
    stop = next(token for token in range(11) if 0 < (wanted == token).any(1).sum() < 3)
    for row in wanted:
        ends = np.flatnonzero(row == stop)
        row[ends[0] if len(ends) else 37 :] = stop
    found = model.generate(PROMPT, 37, mask=MASK, stop_token=stop, draft=language_model(draft), draft_tokens=3)
    np.testing.assert_array_equal(found, wanted)


def share_that_stood(model, *arguments, **options):
    tokens = zoo.stream(model, *arguments, **options)
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("mixer", ["softmax", "hybrid"])
def test_all_that_the_model_itself_drafts_stands(mixer):
    model = language_model(mixer)
    assert share_that_stood(model, PROMPT, 14, draft=model, temperature=1.0, top_p=0.9, mask=MASK, rngs=nnx.Rngs(0)) == 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Masked(Bigrams):
    """Bigrams that count real tokens only."""

    def extend(self, tokens, cache, *, mask=None):
        return self.table[tokens], cache + (tokens.shape[1] if mask is None else mask.sum(1, dtype=jnp.int32))


def table(seed, vocabulary=5):
    return 1.5 * jax.random.normal(jax.random.key(seed), (vocabulary, vocabulary))


@pytest.mark.parametrize("sampling", [dict(), dict(temperature=0.7, top_k=3), dict(top_p=0.8), dict(top_k=4, top_p=0.7)])
def test_samples_are_distributed_as_the_models_alone(sampling):
    sampling = {"temperature": 1.0, **sampling}
    model, draft, samples = Masked(table(0)), Masked(table(1)), 40_000
    prompt = jnp.zeros((samples, 1), jnp.int32)
    found = np.asarray(zoo.generate(model, prompt, 3, draft=draft, draft_tokens=2, rngs=nnx.Rngs(0), **sampling))
    empirical = np.zeros((5, 5))
    np.add.at(empirical, (found[:, 1], found[:, 2]), 1 / samples)
    p = np.stack([exactly(row, **sampling) for row in np.asarray(table(0), np.float64)])
    exact = (p[0] @ p)[:, None] * p
    assert np.abs(empirical - exact).sum() / 2 < 0.012
    # which tells it from the draft's
    q = np.stack([exactly(row, **sampling) for row in np.asarray(table(1), np.float64)])
    assert np.abs((p[0] @ q)[:, None] * q - exact).sum() / 2 > 0.2


def exactly(logits, temperature, top_k=5, top_p=1.0):
    order = np.argsort(-logits)
    likely = np.exp(logits[order] / temperature) * (np.arange(5) < top_k)
    likely /= likely.sum()
    likely *= np.cumsum(likely) - likely < top_p
    return (likely / likely.sum())[np.argsort(order)]


def test_a_sample_without_finite_logits_ends_and_a_draft_without_them_changes_nothing():
    cycle = jnp.full((5, 5), -jnp.inf).at[jnp.arange(5), (jnp.arange(5) + 1) % 5].set(0.0)
    broken = Masked(cycle.at[3].set(jnp.nan))
    found = zoo.generate(broken, jnp.array([[0], [3], [4]]), 6, draft=Masked(cycle))
    np.testing.assert_array_equal(found, [[1, 2, 3, -1, -1, -1], [-1] * 6, [0, 1, 2, 3, -1, -1]])
    found = zoo.generate(Masked(cycle), jnp.array([[0], [3]]), 6, draft=broken)
    np.testing.assert_array_equal(found, [[1, 2, 3, 4, 0, 1], [4, 0, 1, 2, 3, 4]])


def test_a_stream_is_the_generation_and_tells_how_many_stood():
    model, prompt = Masked(table(0)), jnp.array([[0], [1], [2], [3]])
    sampling = dict(temperature=1.0, stop_token=4)
    wanted = zoo.generate(model, prompt, 12, draft=Masked(table(1)), rngs=nnx.Rngs(0), **sampling)
    tokens, found = zoo.stream(model, prompt, 12, draft=Masked(table(1)), rngs=nnx.Rngs(0), **sampling), []
    with pytest.raises(StopIteration) as end:
        while True:
            found.append(next(tokens))
    assert 0 < end.value.value < 1
    np.testing.assert_array_equal(jnp.stack(found, axis=1), wanted[:, : len(found)])
    assert len(found) == 12 or (found[-1] == 4).all()
    assert share_that_stood(model, prompt, 2) is None


def test_many_lengths_are_one_program():
    model, call = Masked(table(0)), dict(draft=Masked(table(1)), draft_tokens=3)
    wanted = zoo.generate(model, jnp.ones((2, 4), jnp.int32), 16, **call)
    before = generation._generate._cache_size()
    for length, num_tokens in ((4, 1), (3, 5), (15, 9)):
        found = zoo.generate(model, jnp.ones((2, length), jnp.int32), num_tokens, **call)
        np.testing.assert_array_equal(found, wanted[:, :num_tokens])
    assert generation._generate._cache_size() == before


def test_a_cache_of_keys_and_values_is_rewound_and_no_other():
    model = language_model("softmax")
    _, cache = model.extend(PROMPT, model.init_cache(3, 9), mask=MASK)
    _, longer = model.extend(PROMPT[:, :3], cache)
    count = jnp.array([3, 1, 2])
    rewound = model.rewind(longer, count)
    again = model.extend(PROMPT[:, :3], cache, mask=jnp.arange(3) < 3 - count[:, None])[1]
    wanted, found = (model.extend(PROMPT[:, :2], one)[0] for one in (again, rewound))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    hybrid = language_model("hybrid")
    assert hybrid.rewind(hybrid.init_cache(3, 9), count) is None


@pytest.mark.parametrize(
    "draft,options,error,words",
    [
        ("softmax", dict(draft_tokens=0), ValueError, "draft_tokens must be an integer >= 1, got 0"),
        ("softmax", dict(draft_tokens=2.0), TypeError, "draft_tokens must be an integer that is known outside.*got 2.0"),
        (Masked(table(0)), dict(), ValueError, "draft must have the model's vocabulary of 11, got 5"),
        (Bigrams(table(0, 11)), dict(), TypeError, "draft must have an extend that takes mask"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), dict(), TypeError, "draft must have init_cache and extend, got a Linear"),
        (dict(max_length=6), dict(), ValueError, "num_tokens must be at most 3 after 4 tokens, of a draft for 6, got 4"),
    ],
)
def test_drafts_are_refused(draft, options, error, words):
    if isinstance(draft, dict):
        draft = zoo.CausalLM(**{**SMALL, **draft}, mixer="softmax", mixer_options=dict(num_heads=2), rngs=nnx.Rngs(0))
    draft = language_model(draft) if isinstance(draft, str) else draft
    with pytest.raises(error, match=words):
        language_model("softmax").generate(PROMPT, 4, draft=draft, **options)
