"""Files here and behind urls: locations, atomic publication, locks, digests, the download cache."""
