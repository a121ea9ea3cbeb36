"""Programs that `interleave.race` starts. Each trains one shape with one library."""
