"""Timings that jspeed is held to. Each script prints a table and fails where a limit is passed."""
