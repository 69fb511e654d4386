"""Shell completion."""

import shutil
import subprocess

import pytest

from kd_lightning.__main__ import main
from kd_lightning.cli.arguments import COMMANDS, VERBS
from kd_lightning.cli.commands.completion import whole_parser


def test_parser_has_all_commands_and_their_options():
    (commands,) = [action.choices for action in whole_parser()._actions if isinstance(action.choices, dict)]
    assert {*commands} == {*VERBS, *COMMANDS}
    assert "--strategy" in commands["query"]._option_string_actions
    assert {"--ckpt_path", "--name"} <= {*commands["fit"]._option_string_actions}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_script(shell, capsys):
    main(["completion", shell])
    text = capsys.readouterr().out
    assert "kd-lightning" in text and "experiment" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["exper"], ["experiment"]),
        (["fit", "--see"], ["--seed_everything"]),
        (["clean", "--action", "re"], ["relabel"]),
    ],
)
def test_bash_completes(words, found, capsys):
    main(["completion", "bash"])
    script = capsys.readouterr().out
    call = f"COMP_WORDS=(kd-lightning {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_kd_lightning; "
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{call} printf '%s\\n' \"${{COMPREPLY[@]}}\""],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == found


def test_unknown_shell(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "fish"])
    assert end.value.code == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
