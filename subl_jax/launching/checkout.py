"""What "this version" means: the commit that is checked out, as an archive with a stamp that workers are compared by."""

from __future__ import annotations

import re
from pathlib import Path

from subl_jax.launching.command import LaunchError
from subl_jax.launching.programs import Programs

ROOT = Path(__file__).resolve().parent.parent.parent
# So many digits of a commit name it in stamps, archives and image tags.
DIGITS = 12


def stamp(commit: str) -> str:
    """Version and commit in one word, as it stands in a worker's VERSION file."""
    found = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{found.group(1) if found else '0'}+g{commit[:DIGITS]}"


def head(programs: Programs, allow_dirty: bool) -> str:
    """The commit that is checked out; git is asked even in a dry run, since it changes nothing.

    Args:
      programs: says warnings.
      allow_dirty: only warn of changes that are not committed. They are left out either way.

    Raises:
      LaunchError: this is no checkout, or it has changes that are not committed.
    """
    git = Programs()
    found = git.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=False)
    if found.code:
        raise LaunchError(
            f"{ROOT} is no git checkout with a commit, so there is no version to install; clone the repository"
        )
    changed = git.run(["git", "-C", str(ROOT), "status", "--porcelain"]).out.splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed[:5]) + (
            f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        )
        if not allow_dirty:
            raise LaunchError(
                f"not committed: {names}; commit it, or pass --allow_dirty to go on with HEAD, which lacks it"
            )
        programs.note(f"warning: HEAD lacks what is not committed: {names}")
    return found.out.strip()


def archive(programs: Programs, commit: str, folder: Path) -> Path:
    """Packs a commit, even one that is no longer checked out, so that a resumed run goes on with its own version."""
    target = folder / f"subl_jax-{stamp(commit)}.tar.gz"
    if not programs.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    programs.run(["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={target}", commit])
    return target
