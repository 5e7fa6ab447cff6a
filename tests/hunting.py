"""Hunts: a state machine with some of its rules only, so that what they can break is found soon."""

from hypothesis import settings
from hypothesis.stateful import RULE_MARKER, RuleBasedStateMachine, run_state_machine_as_test


def hunt(
    machine: type[RuleBasedStateMachine], how: settings, rules: set[str] | None = None, **attributes: object
) -> None:
    """Run a machine with these rules, by default all of its own, and with other attributes."""
    own = {name for name in dir(machine) if hasattr(getattr(machine, name), RULE_MARKER)}
    dropped = dict.fromkeys(set() if rules is None else own - rules)
    unknown = set() if rules is None else rules - own
    assert not unknown, f"{machine.__name__} has no {unknown}"
    run_state_machine_as_test(type("Hunted", (machine,), {**dropped, **attributes}), settings=how)
