"""`python -m wan_mlperf.bench speed | decode | load | fidelity | embedded | profile | serve`."""

from __future__ import annotations

from collections.abc import Sequence

from wan_mlperf import process
from wan_mlperf.errors import choose

COMMANDS = ("speed", "decode", "load", "fidelity", "embedded", "profile", "serve")


def main(arguments: Sequence[str]) -> int:
    """Run the measurement that was asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m wan_mlperf.bench {{{','.join(COMMANDS)}}} [--help]")
        return process.DONE if arguments else process.BAD_INPUT
    command = choose("bench", arguments[0], COMMANDS)
    if command == "speed":
        from wan_mlperf.bench import speed

        return speed.main(arguments[1:])
    if command == "decode":
        from wan_mlperf.bench import decode

        return decode.main(arguments[1:])
    if command == "load":
        from wan_mlperf.bench import load

        return load.main(arguments[1:])
    if command == "profile":
        from wan_mlperf.bench import profile

        return profile.main(arguments[1:])
    if command == "serve":
        from wan_mlperf.bench import serve

        return serve.main(arguments[1:])
    from wan_mlperf.bench import fidelity

    return fidelity.main(arguments[1:]) if command == "fidelity" else fidelity.main_embedded(arguments[1:])


if __name__ == "__main__":
    process.entry(main)
