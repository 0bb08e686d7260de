"""The test tree mirrors the source tree."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests" / "unit"


def test_the_responder_does_not_shadow_dnspython() -> None:
    assert not (ROOT / "dns" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted(UNIT.rglob("test_*.py")), ids=lambda path: str(path.relative_to(UNIT)))
def test_each_unit_test_stands_where_its_module_stands(path: Path) -> None:
    folder = path.parent.relative_to(UNIT)
    if path == UNIT / "test_tree.py" or folder.parts[:1] == ("deploy",):
        return
    base = ROOT / "dns" if folder.parts[:1] == ("vmnet_dns",) else ROOT / "vmnet"
    module = base / folder / path.name.removeprefix("test_")
    package = base / folder / path.name.removeprefix("test_").removesuffix(".py")
    assert module.exists() or package.is_dir(), f"{path.relative_to(ROOT)} tests no module {module.relative_to(ROOT)}"
