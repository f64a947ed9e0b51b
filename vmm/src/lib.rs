//! A small KVM virtual machine monitor; it knows nothing of OCI.
