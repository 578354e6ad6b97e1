"""Recipe x checkpoint -> units, shards and output specs. Pure: headers in, data out."""
