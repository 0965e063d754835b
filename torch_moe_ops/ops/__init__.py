"""The ops, one file each: the schema, the static facts a backend is chosen from, and the public function."""
