"""Classes: collected, sorted, numbered, and refused where they are not what they should be."""

from collections.abc import Sequence

from refusal import refused

from loracle.reference import DataError
from loracle.torch_impl.data import Labelled, Tagged
from loracle.torch_impl.labels import Labels, collect_labels


def labelled(*labels: str | int) -> list[Labelled]:
    return [Labelled(line, "t", None, label) for line, label in enumerate(labels, start=1)]


def test_names_are_sorted_as_strings_and_numbers_by_value() -> None:
    assert collect_labels(labelled("b", "a", "b", "B"), "d").names == ("B", "a", "b")
    assert collect_labels(labelled(10, 9, -1, 10), "d").names == ("-1", "9", "10")
    tagged = [Tagged(1, ("x", "y"), ("O", "B-PER")), Tagged(2, ("z",), ("I-PER",))]
    assert collect_labels(tagged, "d").names == ("B-PER", "I-PER", "O")


def test_both_directions_agree() -> None:
    labels = Labels(("no", "yes"))
    assert labels.id2label == {0: "no", 1: "yes"}
    assert labels.label2id == {"no": 0, "yes": 1}
    assert [labels.index(name, "w") for name in ("yes", "no")] == [1, 0]
    assert Labels(("3", "7")).index(7, "w") == 1


def test_a_checkpoints_numbers_are_kept_for_the_same_names() -> None:
    labels = Labels(("a", "b", "c"))
    assert labels.in_order_of({0: "b", 2: "a", 1: "c"}).names == ("b", "c", "a")
    for other in ({0: "a", 1: "b"}, {0: "a", 1: "b", 2: "d"}, {0: "LABEL_0", 1: "LABEL_1"}, {}, None):
        assert labels.in_order_of(other) == labels


def test_an_unknown_class_is_refused_with_its_place() -> None:
    refused(
        lambda: Labels(("no", "yes")).index("maybe", "held.jsonl, line 3: label"),
        DataError,
        "held.jsonl, line 3: label: expected one of the classes 'no', 'yes', got 'maybe'; "
        "only classes of the training data can be told apart",
    )
    refused(
        lambda: Labels(tuple(str(n) for n in range(10))).index(10, "w"),
        DataError,
        "w: expected one of the classes '0', '1', '2', '3', '4', '5', '6', '7' and 2 more, got '10'; "
        "only classes of the training data can be told apart",
    )


def test_what_is_no_set_of_classes_is_refused() -> None:
    cases: list[tuple[Sequence[Labelled], str]] = [
        (
            labelled("a", 1, "b"),
            "d: expected classes that are all names or all integers, got 'a' in line 1 and 1 in line 2",
        ),
        (
            labelled("a", "a"),
            "d: expected at least two classes, got 'a' alone; there is nothing to tell apart",
        ),
    ]
    for examples, message in cases:
        refused(lambda examples=examples: collect_labels(examples, "d"), DataError, message)  # type: ignore[misc]
