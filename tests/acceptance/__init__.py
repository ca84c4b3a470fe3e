"""What users were promised, tried over HTTP against real processes that are killed, stopped and cut off."""
