"""What the schedules of every device share."""
