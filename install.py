"""Run by the webui when it starts: says what is missing, if anything is. It installs nothing: the webui has it all."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

NEEDED = {"torch": (2, 0), "safetensors": (0, 4)}


def complaints() -> list[str]:
    """A sentence for each package that is missing or too old."""
    found = []
    for package, least in NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            installed = version(package)
        except PackageNotFoundError:
            found.append(f"LoRACLR Merge needs {package} {wanted} or newer, which is not installed; update the webui.")
            continue
        numbers = installed.split("+")[0].split(".")[:2]
        if all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < least:
            found.append(
                f"LoRACLR Merge needs {package} {wanted} or newer, {installed} is installed; update the webui."
            )
    return found


if __name__ == "__main__":
    for complaint in complaints():
        print(complaint)
