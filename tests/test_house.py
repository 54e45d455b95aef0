"""The picture of the house shows the rooms that there are."""

from __future__ import annotations

import re

from tests.house import PICTURE, arrows, essential, layers, room


def test_the_picture_has_every_room_in_its_place() -> None:
    drawn = re.findall(r"<text [^>]*font-weight: 700[^>]*>(\w+)</text>", PICTURE.read_text())[1:]  # without the title
    assert drawn == [name for layer in layers() for name in layer], "draw it again: make house"


def test_rooms_and_arrows_are_read_from_the_package() -> None:
    hooking, ground = room("hooking"), room("errors")
    assert hooking.purpose.startswith("How a policy becomes a hooked one")
    assert hooking.files > 1 == ground.files
    assert hooking.lines > ground.lines > 100
    found = arrows()
    assert found["hooking", "errors"] > 1
    assert not any(source == "errors" for source, _ in found)


def test_arrows_that_follow_from_others_are_pale() -> None:
    down = {("roof", "hall"), ("hall", "cellar"), ("roof", "cellar"), ("roof", "garden")}
    assert essential(down, ["roof", "hall", "cellar", "garden"]) == down - {("roof", "cellar")}
