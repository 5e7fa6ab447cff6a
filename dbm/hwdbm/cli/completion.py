"""``hwdbm completion``: a script for a shell that completes commands, options, choices and examples.

The scripts call ``hwdbm completion --line LINE``, with what stands before the cursor, and show what it prints: a word a
line, with a tab and its meaning where there is one. Where it prints nothing, the shell completes files.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from hwdbm.cli import options, parse
from hwdbm.cli.streams import Verbatim, result

EPILOG = """Examples:

  In the shell that runs now; the same line in ~/.bashrc is for each shell:

\b
    eval "$(hwdbm completion bash)"

  For zsh, after compinit in ~/.zshrc:

\b
    eval "$(hwdbm completion zsh)"

  For fish:

\b
    hwdbm completion fish | source
"""

# bash takes ':' and '=' for the ends of words: what stands before the last of them stays on the line.
_BASH = r"""_hwdbm_completion() {
    local line=${COMP_LINE:0:COMP_POINT} word before IFS=$'\n'
    word=${line##*[[:space:]]}
    before=${word%"${word##*[=:]}"}
    COMPREPLY=($(hwdbm completion --line "$line" 2>/dev/null | cut -f 1))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o bashdefault -o default -F _hwdbm_completion hwdbm"""

_ZSH = r"""_hwdbm_completion() {
    local line word=${(S)PREFIX}
    local -a words_ shown
    for line in "${(@f)$(hwdbm completion --line "${BUFFER[1,CURSOR]}" 2>/dev/null)}"; do
        [[ -n $line ]] || continue
        words_+=("${line%%$'\t'*}")
        shown+=("${line/$'\t'/  }")
    done
    if (( $#words_ )); then
        compadd -l -d shown -a words_
    else
        _files
    fi
}
compdef _hwdbm_completion hwdbm"""

_FISH = r"""function __hwdbm_words
    hwdbm completion --line (commandline --cut-at-cursor --current-process | string collect) 2>/dev/null
end
complete --command hwdbm --no-files --condition 'count (__hwdbm_words) >/dev/null' --arguments '(__hwdbm_words)'"""


class _Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


_SCRIPTS = {_Shell.BASH: _BASH, _Shell.ZSH: _ZSH, _Shell.FISH: _FISH}


def completion(
    context: typer.Context,
    shell: Annotated[
        _Shell | None,
        typer.Argument(
            parser=options.parser(parse.choice(_Shell)),
            metavar="bash|zsh|fish",
            help="The shell.",
            show_default=False,
        ),
    ] = None,
    line: Annotated[str | None, typer.Option("--line", hidden=True)] = None,
) -> None:
    """Print a script that completes commands, options and values in a shell.

    Words that have no completion of their own are completed as files.
    """
    if line is not None:
        found = dict(_candidates(context.find_root(), line))
        if found:
            sys.stdout.write("".join(f"{word}\t{about}\n" if about else f"{word}\n" for word, about in found.items()))
    elif shell is None:
        raise typer.BadParameter(f"name a shell: {', '.join(_Shell)}")
    else:
        result(Verbatim(_SCRIPTS[shell]))


def _candidates(context: Any, line: str) -> Iterator[tuple[str, str]]:
    """Yield the words that the last one of a command line may become, with what they mean."""
    words, word = _split(line)
    words = words[1:]  # the program's name
    while hasattr(context.command, "list_commands"):
        group, name = context.command, words.pop(0) if words else None
        if name is None:
            break
        if name.startswith("-"):
            continue
        command = group.get_command(context, name)
        if command is None:
            return
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
    wanted, prefix, rest = _wanted(context.command, words, word)
    if wanted is not None:
        yield from ((prefix + value, meaning) for value, meaning in _values(context, wanted, rest))
    elif word.startswith("-"):
        yield from _options(context.command, words, word)
    elif hasattr(context.command, "list_commands"):
        for name in context.command.list_commands(context):
            if name.startswith(word):
                yield name, context.command.summary(context, name)


def _split(line: str) -> tuple[list[str], str]:
    """Return the words of a line that are complete, and the one that isn't yet; quotes may be open."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words.extend(lexer)
    except ValueError:  # an open quote
        words.append(lexer.token.lstrip("\"'"))
        return words[:-1], words[-1]
    return (words, "") if not line or line[-1].isspace() else (words[:-1], words[-1])


def _wanted(command: Any, words: list[str], word: str) -> tuple[Any, str, str]:
    """Return the parameter that a word is a value of, if it is one, what of the word stays, and the value so far."""
    named = {name: each for each in command.params for name in (*each.opts, *each.secondary_opts)}
    flags = {name for name, each in named.items() if getattr(each, "is_flag", False)}
    option, equals, value = word.partition("=")
    if equals and option in named:
        return named[option], f"{option}=", value
    if words and words[-1] in named.keys() - flags and words[-1].startswith("-"):
        return named[words[-1]], "", word
    if word.startswith("-"):
        return None, "", word
    given, skip = 0, False
    for each in words:
        given += not skip and not each.startswith("-")
        skip = not skip and each.startswith("-") and each in named.keys() - flags
    for argument in (each for each in command.params if each.param_type_name == "argument"):
        if argument.nargs == -1 or given == 0:
            return argument, "", word
        given -= 1
    return None, "", word


def _values(context: Any, parameter: Any, word: str) -> Iterator[tuple[str, str]]:
    """Yield what a parameter's value may become: what completes it, or the words that stand for it in the help."""
    if re.fullmatch(r"[a-z0-9-]+(\|[a-z0-9-]+)+", parameter.metavar or ""):
        yield from ((each, "") for each in parameter.metavar.split("|") if each.startswith(word))
    for item in parameter.shell_complete(context, word):
        if getattr(item, "type", "plain") == "plain":
            yield item.value, item.help or ""


def _options(command: Any, words: list[str], word: str) -> Iterator[tuple[str, str]]:
    for each in command.params:
        if each.param_type_name != "option" or each.hidden:
            continue
        names = [*each.opts, *each.secondary_opts]
        if each.multiple or not set(names) & set(words):
            for name in names:
                if name.startswith("--") and name.startswith(word):
                    yield name, " ".join((each.help or "").split()).partition(". ")[0].rstrip(".")
