"""``colrow train CONFIG.yaml``: train a language model on text, cut over ranks."""

from __future__ import annotations

import sys
from dataclasses import asdict

from colrow.train.parse import parse


def run(arguments: list[str]) -> int:
    """Run the command.

    Under torchrun, Slurm or MPI this process is one of the ranks; otherwise it checks everything, writes the
    run's folder and starts ``tp`` local ranks.

    Args:
        arguments: what follows ``colrow train``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: in one line, for a configuration that cannot be used.
        LaunchError: if a rank failed.
        KeyboardInterrupt: after Ctrl-C, when all ranks have ended.
    """
    configuration = parse(arguments or ["--help"])
    # what follows imports torch and transformers, which a mistake or --help need not wait for
    from colrow.launch import launch
    from colrow.launch.environment import apply

    if apply() is not None:
        from colrow.train.loop import train

        train(asdict(configuration), prepared=False)
        return 0
    from colrow.train.folder import RunFolder
    from colrow.train.prepare import prepare

    print(*prepare(configuration), f"starting {configuration.mesh.ranks} ranks", sep="\n", flush=True)
    arguments_of_train = {"configuration": asdict(configuration), "prepared": True}
    try:
        launch("colrow.train.loop:train", arguments_of_train, configuration.mesh.ranks)
    except KeyboardInterrupt:
        latest = RunFolder(configuration.run_folder).checkpoints / "latest"
        if latest.exists():
            print(f"\ninterrupted: --resume continues from {latest.read_text()}", file=sys.stderr)
        raise
    return 0
