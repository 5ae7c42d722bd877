.PHONY: proto check-proto

proto:  ## regenerate the gRPC stubs
	proto/generate.sh

check-proto:  ## lint the API, look for breaking changes, and for stale stubs
	proto/generate.sh --check
