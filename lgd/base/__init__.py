"""What everything else stands on: errors, text for people, logs, records, the state of the process."""
