"""What the tests' own helpers must get right."""

from tests.ray_helpers import running

PRINTS = "for number in range(2000): print(number, flush=True)"


def test_reading_a_commands_output_does_not_move_where_it_writes() -> None:
    with running(["-c", PRINTS]) as command:
        while command.process.poll() is None:
            assert "1" not in command.stdout[:1]
        assert command.stdout.splitlines() == [str(number) for number in range(2000)]
