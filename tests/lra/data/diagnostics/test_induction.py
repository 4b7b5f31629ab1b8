import pytest

from subquad.lra.data.diagnostics.induction import Induction


@pytest.mark.parametrize("length", [4, 16, 256])
def test_the_answer_followed_the_first_special_token(length):
    one = Induction(length=length)
    for part in one.splits().values():
        for index in range(20):
            inputs, targets = (part[index][field].tolist() for field in ("inputs", "targets"))
            assert [at for at, token in enumerate(inputs) if token == 1] == [inputs.index(1), length - 1]
            assert targets == [-1] * (length - 1) + [inputs[inputs.index(1) + 1] - 2]


def test_it_is_asked_of_every_place_and_length():
    part = Induction(length=6).splits()["train"]
    assert {part[index]["inputs"].tolist().index(1) for index in range(200)} == {0, 1, 2, 3}
    longer = Induction(length=64).at_length(65_536).splits()["test"][0]
    assert longer["inputs"].shape == longer["targets"].shape == (65_536,)
    with pytest.raises(ValueError, match="Induction: length must be >= 3, got 2"):
        Induction(length=64).at_length(2)


def test_it_is_the_same_everywhere():
    assert Induction(length=8).example("train", 7)["inputs"].tolist() == [16, 3, 2, 11, 16, 1, 8, 1]
