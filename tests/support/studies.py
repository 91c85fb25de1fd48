"""How tests run what a study in tools/studies runs."""

from lgd.cli import main
from tools.studies import evidence


def run_here(commands):
    """Run commands as `evidence.run_all` does, those of `lgd` in this process, which has imported all already."""
    for command in commands:
        status = main(command[1:]) if command[0] == "lgd" else evidence.run_all([command])
        if status:
            return status
    return 0


def list_trained(err):
    """The folders of the networks that were trained, by what was logged."""
    return {line.partition("trained: ")[2].split()[0] for line in err.splitlines() if "] trained: " in line}
