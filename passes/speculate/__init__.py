"""Draft-and-verify decoding: rules of acceptance and drafters, one file each; none of them changes what is decoded."""
