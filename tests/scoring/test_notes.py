from lgd.scoring.notes import count_notes, join_notes


def test_notes_are_counted_by_image_in_the_order_in_which_they_came():
    notes = [["pale", "small"], [], ["small", "small"], ["small"]]
    assert count_notes(iter(notes), "images") == ["1 of 4 images: pale", "3 of 4 images: small"]
    assert count_notes([[], []], "images") == count_notes([], "images") == []


def test_a_cell_has_all_notes():
    assert join_notes(["pale", "small"]) == "pale; small" and join_notes([]) == ""
