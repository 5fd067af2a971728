"""What the README shows must run as it stands."""

from code_blocks import ROOT, python_blocks, run

README = ROOT / "README.md"


def test_the_twelve_lines(capsys):
    (block,) = python_blocks(README)
    names = run(block)
    assert names["when"].vectors.shape == (3, names["x"].shape[1])
    assert 1 <= names["rank"].value <= names["flow"].ntk.domain.dimension
    printed = capsys.readouterr().out
    assert "of the loss after" in printed and "error" in printed


def test_it_is_read_in_three_minutes():
    assert len(README.read_text().splitlines()) <= 150
