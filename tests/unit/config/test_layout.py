"""The paper's layout notation."""

import pytest

from mesh_megatron.config.layout import Layout


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("4+8R2+4", Layout(4, 8, 2, 4, shared=True)),
        ("3+6R3+3", Layout(3, 6, 3, 3, shared=True)),
        ("4+8+8+4", Layout(4, 8, 2, 4, shared=False)),
        ("2+4+2", Layout(2, 4, 1, 2, shared=False)),
        ("24", Layout(12, 0, 0, 12, shared=False)),
        ("7", Layout(3, 0, 0, 4, shared=False)),
    ],
)
def test_parsed_and_printed_as_the_paper_writes_it(text, layout):
    assert Layout.parse(text) == layout
    assert str(layout) == text


def test_depths():
    shared, unshared = Layout.parse("4+8R2+4"), Layout.parse("4+8+8+4")
    assert (shared.unique_layers, shared.computed_layers) == (16, 24)
    assert (unshared.unique_layers, unshared.computed_layers) == (24, 24)
    assert shared.unshared() == unshared
    assert [shared.core_slice(1), unshared.core_slice(1)] == [range(8), range(8, 16)]


@pytest.mark.parametrize("text", ["", "0", "4+8R0+4", "4+0R2+4", "4+8R2", "4+8+9+4", "a+bRc+d", "4-8R2+4", "4+R2+4"])
def test_anything_else_names_the_flag_and_what_is_accepted(text):
    with pytest.raises(ValueError, match="--layout.*(write P\\+CRK\\+Q|R1 or more|at least)"):
        Layout.parse(text)
