"""Messages of an interface in protobuf, from a short description instead of its file, which no package has.

A line a message, then its fields as `name type number`; `*` repeats a field, `Name` is another message.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def message_classes(description):
    """The messages as protobuf classes, by name."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="messages.proto", package="messages", syntax="proto3")
    for line in description.replace(",\n   ", ",").strip().splitlines():
        name, fields = line.split(":")
        message = file.message_type.add(name=name)
        for field in filter(None, map(str.strip, fields.split(","))):
            field_name, kind, number = field.split()
            added = message.field.add(name=field_name.lstrip("*"), number=int(number))
            added.label = kinds.LABEL_REPEATED if field_name[0] == "*" else kinds.LABEL_OPTIONAL
            if kind[0].isupper():
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".messages.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    # The second is how versions before 4.22 call it.
    make = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    names = [message.name for message in file.message_type]
    return {name: make(pool.FindMessageTypeByName(f"messages.{name}")) for name in names}
