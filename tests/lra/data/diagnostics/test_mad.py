import numpy as np
import pytest

from subquad.lra.data.diagnostics import mad

RECALLS = [mad.InContextRecall(), mad.InContextRecall(length=64, vocabulary=32, noise=16, noise_share=0.6)]


def ids(example):
    return (example["inputs"] - 1).tolist(), example["targets"].tolist()


@pytest.mark.parametrize("one", RECALLS)
def test_recall_asks_for_the_values_of_keys_that_were_shown(one):
    for index in range(20):
        inputs, targets = ids(one.splits()["test"][index])
        known, wanted = {}, [-1] * len(inputs)
        for at in range(0, len(inputs), 2):
            key = inputs[at]
            if key >= one.keys:  # two noise tokens
                assert inputs[at] >= one.vocabulary - one.noise <= inputs[at + 1] and one.noise_share
                continue
            if key in known:
                wanted[at] = known[key]
                assert inputs[at + 1 : at + 2] in ([known[key]], [])
            elif at + 1 < len(inputs):
                known[key] = inputs[at + 1]
        assert targets == wanted and targets[-1] >= 0 and len(inputs) == one.length - 1


def test_the_share_of_noise_is_drawn():
    part = RECALLS[1].splits()["train"]
    noisy = np.mean([[token >= 16 for token in ids(part[index])[0][::2]] for index in range(200)])
    assert noisy == pytest.approx(0.6 * 30 / 32, abs=0.03)


@pytest.mark.parametrize("one", [*RECALLS, mad.FuzzyRecall()])
def test_in_training_every_next_token_is_asked(one):
    for index in range(5):
        inputs, targets = ids(one.splits()["train"][index])
        assert targets[:-1] == inputs[1:] and targets[-1] >= one.keys


def test_fuzzy_recall_asks_for_groups_that_were_shown():
    """Keys have three tokens in test: what follows one up to the next key is its value."""
    one = mad.FuzzyRecall()
    for index in range(30):
        inputs, targets = ids(one.splits()["test"][index])
        tokens, wanted, known, at = [*inputs, targets[-1]], [], {}, 0
        while tokens[at] == one.vocabulary - 1:
            at, wanted = at + 1, [*wanted, -1]
        while at < len(tokens):
            key, end = tuple(tokens[at : at + 3]), at + 3
            assert max(key) < one.keys and len(set(key)) == 3
            while end < len(tokens) and tokens[end] >= one.keys:
                end += 1
            value = tokens[at + 3 : end]
            assert 1 <= len(value) == len(set(value)) <= 3 and known.get(key, value) == value
            wanted += [-1] * 3 + (value if key in known else [-1] * len(value))
            known[key], at = value, end
        assert targets == wanted[1:] and len(inputs) == one.length and targets[-1] >= one.keys


def test_copies_are_in_order_and_the_last_of_them_ends_the_context():
    one = mad.MadSelectiveCopy()
    for index in range(10):
        inputs, targets = ids(one.splits()["test"][index])
        assert len(inputs) == 256 and inputs[-17] == 15 and inputs[-18] < 14 and set(inputs[-16:]) == {14}
        data = [token for token in inputs[:-17] if token != 14]
        assert targets == [-1] * 240 + data and len(data) == 16


def test_compression_asks_for_everything():
    for index in range(5):
        inputs, targets = ids(mad.Compression().example("test", index))
        assert inputs == targets and inputs[-1] == 15 and max(inputs[:-1]) < 15 and len(inputs) == 32


def test_what_is_memorised_is_the_same_in_all_splits():
    one, known = mad.Memorisation(), {}
    for part in one.splits().values():
        for index in range(100):
            inputs, targets = ids(part[index])
            assert set(inputs[1::2]) == {255} and targets[::2] == [-1] * 16
            for key, value in zip(inputs[::2], targets[1::2], strict=True):
                assert key < 127 <= value < 255 and known.setdefault(key, value) == value
    assert len(known) == len(set(known.values())) == 127


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: mad.InContextRecall(length=7), "InContextRecall: length must be even and >= 4, got 7"),
        (lambda: mad.InContextRecall(noise=14), "vocabulary must be >= noise . 4 = 18, got 16"),
        (lambda: mad.InContextRecall(noise_share=0.5), r"noise_share must be in \[0, 1\), and 0 without noise tokens, got 0.5"),
        (lambda: mad.FuzzyRecall(vocabulary=6), "FuzzyRecall: vocabulary must hold as many keys and values as a group has"),
        (lambda: mad.FuzzyRecall(length=18), "FuzzyRecall: length must be > 18, got 18"),
        (lambda: mad.MadSelectiveCopy(data=128), "length must be > 2 . data . 1 = 257, got 256"),
        (lambda: mad.Memorisation(length=31), "Memorisation: length must be even and >= 2, got 31"),
    ],
)
def test_parameters_that_cannot_be_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_they_are_the_same_everywhere():
    golden = {name: ids(one.example("train", 7))[0][-6:] for name, one in (
        ("recall", mad.InContextRecall()), ("fuzzy", mad.FuzzyRecall()), ("copy", mad.MadSelectiveCopy(length=34)),
        ("compression", mad.Compression()), ("memory", mad.Memorisation()))}  # fmt: skip
    assert golden == {
        "recall": [11, 0, 15, 5, 9, 2],
        "fuzzy": [14, 7, 0, 5, 4, 8],
        "copy": [14, 14, 14, 14, 14, 14],
        "compression": [8, 9, 13, 1, 14, 15],
        "memory": [71, 255, 3, 255, 42, 255],
    }
