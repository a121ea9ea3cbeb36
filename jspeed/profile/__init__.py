"""What a program does: its instructions, collectives, buffers and turns, read from the compiled
program itself."""
