"""``vmnet lab workshop``: pods on user-defined networks, command by command, each with what it must show."""
