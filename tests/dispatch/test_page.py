"""docs/operate/cluster.md: its site file and its commands, word for word, on the real Slurm."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.receipts.verification import read_receipts

if TYPE_CHECKING:
    import pytest

    from tests.dispatch.conftest import Lab

PAGE = Path(__file__).parents[2] / "docs/operate/cluster.md"
FORGE = ["nox", "-s", "forge", "--"]


def test_its_commands_lead_to_receipts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only change is where the shared folder is; images of the lab stand for those of `build`.

    They are as small as a shell.
    """
    text = PAGE.read_text()
    root = lab.project.root
    monkeypatch.chdir(root)
    shutil.rmtree(root / "records/receipts", ignore_errors=True)
    shutil.copy(lab.key, root / "key.pem")
    (site,) = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert '"/shared/forge"' in site
    (root / "site.toml").write_text(site.replace("/shared/forge", str(lab.storage)))
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    said, built = "", []
    for line in "".join(blocks).splitlines():
        words = shlex.split(line)
        if words[: len(FORGE)] != FORGE:
            assert lab.cluster.run(*words) in text, "it prints something else"
        elif (command := words[len(FORGE) :])[0] == "build":
            built.append(command[1])
        elif "--sessions" not in command:  # these need a server and its weights
            said += lab.call(*command)
    assert built == ["b300", "rtxpro6000"]
    assert "b300-0.26-kernel" in said
    assert "sent 4 jobs as run" in said
    receipts = read_receipts(lab.project)
    assert not receipts.refused
    assert len(receipts.valid) == 4
    assert all(row.signed_by for row in receipts.valid)
