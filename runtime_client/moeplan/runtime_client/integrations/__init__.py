"""One file per framework or engine: moeplan where people already are."""
